"""The page on governance is run: its console blocks in order, in a folder with the two files that it speaks of."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.engine.registry.files import lora_bytes

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "governance.md").read_text(encoding="utf-8")
HEAD = re.compile(r"^head [0-9a-f]{64}$", flags=re.MULTILINE)


def test_every_command_of_the_page_prints_what_the_page_shows(tmp_path: Path) -> None:
    folder = tmp_path / "store" / "loras"
    folder.mkdir(parents=True)
    for number in (1, 2):
        (folder / f"wash-{number}.safetensors").write_bytes(lora_bytes(seed=number))
    parts = [
        part
        for block in re.findall(r"```console\n(.*?)```", PAGE, flags=re.DOTALL)
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    ]
    assert len(parts) == 10
    for part in parts:
        line, _, shown = part.partition("\n")
        words = shlex.split(line)
        assert words[:2] == ["diffplan", "addons"], line
        done = subprocess.run(
            [sys.executable, "-m", "engine.addons_cli", *words[2:]],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: {done.stderr}"
        # lines carry the time, so the head is another one each time
        assert HEAD.sub("head …", done.stdout) == HEAD.sub("head …", shown), line
