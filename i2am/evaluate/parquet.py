"""Program that writes a table again as Parquet: ``python parquet.py TABLE.csv OUT.parquet TYPES``.

A process of its own, without torch: pyarrow takes 70 MB, which go with it. TYPES is ``{column: pyarrow's name of its
type}`` as JSON. Where it fails, its last line on standard error is ``errno message``, errno 0 where there is none.
"""

from __future__ import annotations

import json
import sys

BLOCK = 1 << 20  # bytes of the table that are held at once


def convert(table: str, out: str, types: dict[str, str]) -> None:
    """Write a CSV table again, with types, block by block.

    Raises:
        OSError: it cannot be read or written.
    """
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    kinds = {name: pyarrow.type_for_alias(kind) for name, kind in types.items()}
    read = pyarrow.csv.ConvertOptions(column_types=kinds, strings_can_be_null=True)
    lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
    blocks = pyarrow.csv.ReadOptions(use_threads=False, block_size=BLOCK)
    with (
        pyarrow.csv.open_csv(table, blocks, lines, read) as rows,
        pyarrow.parquet.ParquetWriter(out, rows.schema) as file,
    ):
        for batch in rows:
            file.write_batch(batch)


def main(words: list[str]) -> int:
    """Run the program; return its exit status."""
    try:
        convert(words[0], words[1], json.loads(words[2]))
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        print(f"{number or 0} {type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    del sys.path[0]  # this file's folder: its names are not the names of packages
    sys.exit(main(sys.argv[1:]))
