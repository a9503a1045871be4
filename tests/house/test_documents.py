"""What the documents list is what the code has."""

import re
from pathlib import Path

from tdmld.cli.exits import Exit
from tdmld.config import config_toml, default_settings

ROOT = Path(__file__).resolve().parents[2]


def test_every_setting_is_documented_with_its_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(
        r"^\| `([a-z_.]+)` \| `--([a-z-]+)` \| `(TDMLD_\w+)` \| `(.+?)` \|", text, re.M
    )
    listed = {key: (flag, variable, default) for key, flag, variable, default in rows}
    assert listed == {
        key: (
            re.sub(r"[._]", "-", key),
            "TDMLD_" + key.replace(".", "_").upper(),
            config_toml({"x": list(value) if isinstance(value, tuple) else value})[4:].strip(),
        )
        for key, value in default_settings().items()
    }


def test_every_exit_code_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    listed = re.findall(r"^\| (\d+) \|", text, re.M)
    assert [int(code) for code in listed] == [int(code) for code in Exit]


def test_links_between_documents_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
