"""Damaged checkpoints of every format but GPTQ: refused for the reason, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conversions import refusals_of
from damage import CHANGES, assert_changes_are_noticed, assert_refused, several
from hypothesis import given, settings
from refusals import FORMATS

every_case = [(form, case) for form, refusals in FORMATS.items() for case in refusals.cases]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("valid")
    return {form: refusals.write(root / form).directory for form, refusals in FORMATS.items()}


@pytest.mark.parametrize(("form", "case"), every_case)
def test_refused(tmp_path: Path, valid: dict[str, Path], form: str, case: str) -> None:
    assert_refused(tmp_path, valid[form], *FORMATS[form].cases[case])


@pytest.mark.parametrize("form", FORMATS)
def test_every_refusal_is_listed_at_once(tmp_path: Path, valid: dict[str, Path], form: str) -> None:
    cases = [FORMATS[form].cases[case] for case in FORMATS[form].together]
    found = refusals_of(tmp_path, valid[form], several(*(damage for damage, _ in cases)))
    assert len(found) == len(cases)
    for _, reason in cases:
        assert any(re.search(reason, refusal) for refusal in found), reason


@settings(max_examples=80, deadline=None)
@given(**CHANGES)
@pytest.mark.parametrize("form", FORMATS)
def test_changed_bytes(
    tmp_path_factory: pytest.TempPathFactory, valid: dict[str, Path], form: str, **change: Any
) -> None:
    assert_changes_are_noticed(tmp_path_factory.mktemp("fuzz"), valid[form], **change)
