"""A record is enough to make its run again, to the last bit on the same machine."""

import json
from pathlib import Path

import pytest
from test_endings import FEW, only_run

from smoltrain.__main__ import main
from smoltrain.runs import ROOT, read


def repeated(capfd, *arguments: str) -> tuple[int, str, str]:
    """The exit code of `smoltrain reproduce`, and what it says at its end, and beside it."""
    capfd.readouterr()
    code = main(["reproduce", *arguments])
    out, err = capfd.readouterr()
    return code, out[out.find("metrics  ") :], err


@pytest.mark.parametrize("more", [(), ("trainer=dpo", "peft=lora", "seed=3")], ids=["sft", "dpo with lora"])
def test_a_run_is_made_again_bit_for_bit(smoltrain, capfd, more):
    (record,) = smoltrain(*more, quick=FEW)
    code, said, err = repeated(capfd, "latest")
    assert (code, said) == (0, "metrics  equal\nweights  equal\n") and "and then" not in err
    first, second = sorted((read(file.parent) for file in ROOT.glob("*/*/run.json")), key=lambda r: r["start"])
    assert first["config_hash"] == second["config_hash"] == record["config_hash"]


def test_what_differs_is_said(smoltrain, capfd):
    Path("mine.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} and 1", "completion": "x"}) + "\n" for n in range(40))
    )
    smoltrain("data.path=mine.jsonl", "data.test_share=0.2", quick=FEW[3:])
    run = only_run(Path.cwd())
    record = read(run) | {"versions": {"torch": "1.0"}}
    record["config"]["trainer"]["args"]["learning_rate"] = 0.002  # as if our own default had been another then
    del record["config"]["hardware"]["nodes"]  # which runs had not, then
    (run / "run.json").write_text(json.dumps(record))
    Path("mine.jsonl").write_text(Path("mine.jsonl").read_text().replace('"x"', '"y"'))
    code, said, err = repeated(capfd, str(run))
    assert code == 1 and "metrics  differ from step 0 on: eval_" in said and "weights  differ in 1 of 1 files" in said
    assert "trainer.args.learning_rate=0.002, as it was: today it would be 0.001" in err
    assert "versions torch: 2." in err and " now, 1.0 then" in err and "fingerprints train: " in err
    new = next(read(file.parent) for file in ROOT.glob("*/*/run.json") if file.parent.resolve() != run)
    assert new["config"]["trainer"]["args"]["learning_rate"] == 0.002


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("--json", "latest"), ("latest",)], ids=str)
def test_what_cannot_be_made_again_is_refused(folder, capsys, arguments):
    assert main(["reproduce", *arguments]) == 2
    assert ("takes one run" in capsys.readouterr().err) is (arguments != ("latest",)) and not list(folder.iterdir())
