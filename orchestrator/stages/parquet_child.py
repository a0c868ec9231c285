"""Writes and reads the one format of calibration texts that exllamav2's converter takes, in the engine's interpreter.

PYTHON parquet_child.py write FILE    texts from standard input, a JSON string a line
PYTHON parquet_child.py read FILE     to standard output: a row's values joined by spaces, as the converter does
"""

import json
import sys


def main(action: str, file: str) -> None:
    """Does it with pandas and fastparquet, which the converter needs, too."""
    import pandas  # type: ignore[import-not-found,import-untyped,unused-ignore]

    if action == "write":
        texts = [json.loads(line) for line in sys.stdin]
        pandas.DataFrame({"text": texts}).to_parquet(file, engine="fastparquet")
        return
    for row in pandas.read_parquet(file, engine="fastparquet").itertuples(index=False):
        print(json.dumps(" ".join(str(value) for value in row)))


if __name__ == "__main__":
    main(*sys.argv[1:])
