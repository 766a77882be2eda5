"""Write README's table of options: the one of layer_streamer/planning/options.py.

python docs/option_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

from layer_streamer.planning.options import markdown_table

README = Path(__file__).resolve().parents[1] / "README.md"
TABLE = re.compile(r"^\| option \| default \| meaning \|\n(?:\|.*\n)+", re.MULTILINE)

text, count = TABLE.subn(lambda _: markdown_table() + "\n", README.read_text(encoding="utf-8"))
if count != 1:
    raise SystemExit(f"{README}: {count} tables of options")
README.write_text(text, encoding="utf-8")
