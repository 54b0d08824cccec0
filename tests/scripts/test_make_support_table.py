"""The support table is made whole, in steps that a stop does not lose."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from gravity_hf.integration.support_table import SupportTable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    path, environment = list(sys.path), dict(os.environ)
    file = ROOT / "scripts" / "make_support_table.py"
    spec = importlib.util.spec_from_file_location("make_support_table", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def table_file(script, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("table") / "support.json"
    script.main(["--types", "bert", "mamba", "--jobs", "2", "--out", str(out)])
    return out


def read(file: Path) -> SupportTable:
    return SupportTable.from_json(file.read_text(encoding="utf-8"))


def test_the_table_says_what_was_examined_with_what(script, table_file):
    table = read(table_file)
    assert table.of("bert").status == "passes"
    assert table.of("mamba").status == "no routed attention"
    assert table.versions == script.versions() and table.commit and table.date
    assert not table_file.with_suffix(".jsonl").exists()


def test_chosen_types_join_the_table(script, table_file, tmp_path):
    out = tmp_path / "support.json"
    out.write_text(table_file.read_text(encoding="utf-8"), encoding="utf-8")
    script.main(["--types", "gpt2", "--jobs", "1", "--out", str(out)])
    assert set(read(out).records) == {"bert", "gpt2", "mamba"}


def test_a_stopped_run_goes_on_where_it_was(script, table_file, tmp_path):
    out = tmp_path / "support.json"
    finished = {**read(table_file).of("bert").to_dict(), "cosine": 0.125}
    lines = [json.dumps(script.versions()), json.dumps(finished), '{"promises": {}']
    out.with_suffix(".jsonl").write_text("\n".join(lines), encoding="utf-8")
    script.main(["--types", "bert", "mamba", "--resume", "--out", str(out)])
    assert read(out).of("bert").cosine == 0.125, "expected bert not to be examined again"
    assert set(read(out).records) == {"bert", "mamba"}


def test_other_versions_are_not_mixed(script, table_file, tmp_path):
    out = tmp_path / "support.json"
    text = table_file.read_text(encoding="utf-8")
    out.write_text(text.replace(script.versions()["transformers"], "5.0.0"), encoding="utf-8")
    with pytest.raises(SystemExit, match="made with .*'transformers': '5.0.0'"):
        script.main(["--types", "bert", "--out", str(out)])


def test_an_unknown_type_is_refused_at_once(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--types", "qwen_2"])
    assert "has no ['qwen_2']" in capsys.readouterr().err
