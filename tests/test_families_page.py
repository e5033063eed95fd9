"""The page of families: what pytest found is what stands there, and a failure is not hidden."""

from pathlib import Path

import families
import pytest

from ecmoe.conversion.upcycling.refusals import REFUSALS
from examples.families import main

CASES = {
    "conversion.test_initialisations::test_step_0_is_exact[Llama-blend]": "",
    "conversion.test_initialisations::test_step_0_is_exact[Llama-copy]": "",
    "conversion.test_initialisations::test_step_0_is_exact[OPT-copy]": '<failure message="apart"/>',
    "modeling_ecmoe.test_packing::test_packed_documents_give_the_logits_of_single_ones[OPT]": "",
    "modeling_ecmoe.test_packing::test_packed_documents_give_the_logits_of_single_ones[Phi]": "",
    "modeling_ecmoe.test_plans::test_parallel_plans[tensor-others]": "",
    "modeling_ecmoe.test_plans::test_parallel_plans[expert-others]": "",
    "modeling_ecmoe.test_serving::test_served_requests_have_the_states[Phi-blend]": '<skipped message="no silu"/>',
    "modeling_ecmoe.test_remote_code::test_remote_code_twice[Phi-OPT]": "",
}


def write(path: Path, cases: dict[str, str]) -> Path:
    rows = []
    for name, end in cases.items():
        module, _, test = name.partition("::")
        rows.append(f'<testcase classname="tests.{module}" name="{test}">{end}</testcase>')
    path.write_text(f"<testsuites><testsuite>{''.join(rows)}</testsuite></testsuites>", encoding="utf-8")
    return path


def cells(page: str, family: str) -> dict[str, str]:
    header = next(line for line in page.splitlines() if line.startswith("| family | `model_type`"))
    row = next(line for line in page.splitlines() if line.startswith(f"| {family} | `"))
    return dict(zip(header.split(" | "), row.split(" | "), strict=True))


@pytest.mark.parametrize("fails", [True, False])
def test_the_page_says_what_the_tests_found(fails: bool, tmp_path: Path) -> None:
    cases = CASES if fails else {name: end for name, end in CASES.items() if "failure" not in end}
    results = write(tmp_path / "results.xml", cases)
    with pytest.raises(SystemExit) as stop:
        main([str(results), "--output", str(tmp_path / "page.md")])
    assert stop.value.code == fails
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert cells(page, "Llama")["exact"] == "2" and cells(page, "Phi")["exact"] == "-"
    assert cells(page, "OPT")["exact"] == ("**1 failed**" if fails else "-")
    # Of a test that shows what a family cannot, and of a group that leaves it out, nothing is counted.
    assert cells(page, "Phi")["packed"] == "1" and cells(page, "OPT")["packed"] == "-"
    assert cells(page, "Phi")["parallel"] == "2" and cells(page, "OPT")["parallel"] == "1"
    assert cells(page, "OPT")["remote code"] == cells(page, "Phi")["remote code"] == "1"
    assert "served: no silu |" in next(line for line in page.splitlines() if line.startswith("| Phi | a pipeline"))
    assert all(f"| {name} | `{kind}` |" in page for name, kind in families.MODEL_TYPES.items())
    assert all(f"`{kind}`" in page for kind in REFUSALS)
