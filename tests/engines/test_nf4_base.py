"""merge.base=nf4: the merge of a QLoRA adapter is the model that was trained, base in 4 bits and adapter on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.adapter import open_adapter
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.stages import pieces
from orchestrator.stages.merge import merge
from orchestrator.stages.nf4 import Nf4, as_trained
from orchestrator.stages.verify import verify_merge

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

# The 16 values of NF4, from table E of the QLoRA paper's appendix (arXiv:2305.14314).
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
TOKENS = [[3, 17, 4, 1, 5, 9, 2, 6, 53, 5, 8, 97, 9, 32]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 192, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=3, num_key_value_heads=3, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, double: bool) -> Any:
    """A QLoRA adapter with random weights, saved; and PEFT's model with it, its base in 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantized)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
    model = peft.get_peft_model(loaded, lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' repacking for such CPUs gives other logits
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_it_is_what_was_trained(base: Path, tmp_path: Path, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(pieces, "PIECE_BYTES", 16 * 192 * 4)  # 16 rows at a time where rows stand alone
    model = trained(base, tmp_path / "lora", double)
    opened, adapters = open_checkpoint(base), [(open_adapter(tmp_path / "lora"), 1.0)]
    options: dict[str, Any] = {"dtype": None, "shard_size": 10**9, "progress": lambda *_: None}
    report = merge(opened, adapters, tmp_path / "nf4", **options, nf4=Nf4(double))
    merge(opened, adapters, tmp_path / "original", **options)

    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)(tokens).logits
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    assert float((other - wanted).abs().max()) > 0.1  # onto the original base it is another model

    assert report["onto"] == {"base": "nf4", "double": double}
    modules = {module["tensor"]: module for module in report["modules"]}
    linears = {name for name in opened.tensors if ".layers." in name and "norm" not in name}
    assert modules.keys() == linears  # those without an adapter went through NF4 as well
    assert all(0.05 < module["nf4_rounding"] < 0.15 for module in modules.values())
    assert [name for name in modules if modules[name]["relative_change"] == 0] == [
        n for n in modules if "k_proj" in n or "o_proj" in n or "up_proj" in n
    ]
    verify_merge(opened, adapters, None, tmp_path / "nf4", Nf4(double))


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 80), (3, 50)])
def test_blocks_run_on_over_the_ends_of_rows(shape: tuple[int, int], double: bool) -> None:
    """As on a GPU: 64 values in row-major order share a scale, whatever the rows are."""
    torch.manual_seed(0)
    rows = torch.randn(shape)
    found = as_trained(rows, Nf4(double)).reshape(-1)
    assert found.shape == (rows.numel(),)
    levels = torch.tensor(NF4_LEVELS)
    for start in range(0, rows.numel(), 64):
        block = rows.reshape(-1)[start : start + 64]
        scale = block.abs().max()
        nearest = levels[(block[:, None] / scale - levels).abs().argmin(dim=1)] * scale
        torch.testing.assert_close(found[start : start + 64], nearest, rtol=0.02 if double else 1e-5, atol=1e-6)
