"""The tasks of bagel-shapes for harnesses: their items, their judge, and what the table says of runs."""

from __future__ import annotations

import json

import pytest
import table
from evaluate import Evaluation
from PIL import Image
from shapes_tasks import TASKS, is_right, write_items
from world import render

from bagel_harnesses.answers import Answerer
from tests.harnesses.conftest import MODEL


# Of the first ones, so that both of right and wrong are among them, and few are drawn.
COUNTS = {"ask": 12, "think": 12, "draw": 1, "plan": 1, "edit": 1, "steps": 1}


def items(tmp_path, task: str, count: int) -> list[dict]:
    write_items(tmp_path, task, count)
    return [json.loads(line) for line in (tmp_path / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_each_answer_is_judged_as_our_own_evaluation_judges_it(shapes_pipe, tmp_path, task):
    count = COUNTS[task]
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": file} for file in item["images"]),
                    {"type": "text", "text": item["question"]},
                ],
            }
        ]
        for item in items(tmp_path, task, count)
    ]
    answers = Answerer(**MODEL, **TASKS[task].settings).answer(conversations, range(count))
    said = [
        answer.text if task in ("ask", "think") else json.dumps(answer.saved(tmp_path, f"{task}_{index}"))
        for index, answer in enumerate(answers)
    ]
    judged = [is_right(item, answer) for item, answer in zip(items(tmp_path, task, count), said, strict=True)]
    assert judged == TASKS[task].own(Evaluation(shapes_pipe, count), TASKS[task].cases(count))


def test_wrong_answers_are_wrong(tmp_path):
    (asked,), (drawn,) = items(tmp_path, "ask", 1), items(tmp_path, "draw", 1)
    (case,) = TASKS["ask"].cases(1)
    assert is_right(asked, f" {case.answer}\n") and not is_right(asked, f"not {case.answer}")
    (case,) = TASKS["draw"].cases(1)
    render(case.scene).save(tmp_path / "right.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "wrong.png")
    assert is_right(drawn, str(tmp_path / "right.png")) and not is_right(drawn, str(tmp_path / "wrong.png"))


@pytest.fixture
def runs(tmp_path):
    """A folder of runs that answered three items."""

    def written(harness: str, right: list[bool]) -> None:
        folder = tmp_path / harness / "ask"
        folder.mkdir(parents=True)
        run = {"right": right, "start": 5.0, "asking": 2.0, "beside": 0.03, "rest": 4.0}
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")

    written("own", [True, False, True])
    return written


def test_the_table_compares_item_by_item(runs, tmp_path):
    runs("lmms_eval", [True, True, False])
    (row,) = table.rows(tmp_path)
    assert dict(zip(table.HEAD, row, strict=True)) | {"harness": "", "task": ""} == {
        "harness": "",
        "task": "",
        "items": "3",
        "its score": "0.6667",
        "our score": "0.6667",
        "differ": "2",
        "start": "5.00 s",
        "in the pipeline": "2.00 s",
        "beside it": "0.03 s",
        "overhead": "1.5%",
        "rest": "4.00 s",
    }


@pytest.mark.parametrize(("right", "ends"), [([True, False, True], False), ([True, True, True], True), (None, True)])
def test_the_table_ends_in_an_error_if_an_item_differs_or_there_is_none(runs, tmp_path, monkeypatch, right, ends):
    if right is not None:
        runs("lm_eval", right)
    monkeypatch.setattr("sys.argv", ["table.py", str(tmp_path)])
    if ends:
        with pytest.raises(SystemExit, match="items whose answers our evaluation judges otherwise"):
            table.main()
    else:
        table.main()


def test_a_run_that_lost_items_is_an_error(runs, tmp_path):
    runs("lmms_eval", [True])
    with pytest.raises(ValueError, match="lmms_eval answered 1 items of ask, and our evaluation 3"):
        table.rows(tmp_path)
