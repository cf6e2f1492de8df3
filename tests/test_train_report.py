"""The report, the curves and the model card of a run made by hand, with everything in it and with the least."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from alignment.train.record import RunRecord
from alignment.train.report import block, changes, code, model_card, plain, reading, write_report

SIDES = ("image_to_text", "text_to_image")
HOSTILE = "evil](http://x.example) <script>alert(1)</script> | `tick`\n---\n# heading ![i](y)\u202e"


def interval(value: float, half: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def metrics(images: Sequence[float], texts: Sequence[float], ranks: Sequence[float]) -> dict[str, dict[str, float]]:
    found = {}
    for side, recalls, rank in zip(SIDES, (images, texts), ranks, strict=True):
        found |= {f"{side}_recall@{k}": interval(value) for k, value in zip((1, 5, 10), recalls, strict=True)}
        found |= {f"{side}_recall_sum": interval(sum(recalls)), f"{side}_median_rank": interval(rank, 0)}
    return found | {"recall_sum": interval(sum(images) + sum(texts), 0.1)}


def gap(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: interval(after[name]["value"] - before[name]["value"], 0.012) for name in before}


BEFORE = metrics((0.388, 0.675, 0.789), (0.297, 0.603, 0.733), (2, 3))
AFTER = metrics((0.431, 0.702, 0.800), (0.260, 0.603, 0.730), (2, 4))
SECOND = metrics((0.300, 0.675, 0.789), (0.297, 0.603, 0.733), (2, 3))
PLAN = {
    "train_images": 6000, "train_captions": 30000, "eval_images": 1000, "eval_captions": 5000, "steps": 600,
    "device": "cpu", "precision": "float32", "estimated_seconds": 4000, "peak_memory_bytes": 2.1e9, "epochs": 6.0,
    "batch_size": 256, "processes": 1,
}  # fmt: skip


def history() -> list[dict[str, Any]]:
    logged: list[dict[str, Any]] = []
    for step in range(10, 610, 10):
        entry = {
            "loss": 4 * math.exp(-step / 200),
            "learning_rate": 1e-5,
            "grad_norm": 1.0,
            "logit_scale": 40 + step / 9,
        }
        logged.append({"step": step, "epoch": step / 100, **entry})
        if step % 100 == 0:
            recalls = {f"eval_{side}_recall@{k}": k / 20 + step / 2000 for side in SIDES for k in (1, 5, 10)}
            logged.append({"step": step, "epoch": step / 100, "eval_recall_sum": 3.0 + step / 1000, **recalls})
    return logged


def least(**changed: Any) -> RunRecord:
    """Make a record without anything that may be left out."""
    known: dict[str, Any] = {
        "command": "python -m alignment.train --model m --data d --output o",
        "started": "2026-01-02T03:04:05",
        "seconds": 50.0,
        "versions": {"torch": "2.13.0"},
        "settings": {"output": "o"},
        "plan": PLAN,
        "data": "",
        "base_model": "m",
        "base_fingerprint": "ab" * 32,
        "fingerprint": "cd" * 32,
        "history": [],
        "before": BEFORE,
        "after": AFTER,
        "difference": gap(BEFORE, AFTER),
        "stopped": "All steps were made.",
        "best_step": 0,
    }
    return RunRecord(**(known | changed))


def full(**changed: Any) -> RunRecord:
    known: dict[str, Any] = {
        "command": "train --model checkpoints/compact --data '/home/a person/flickr8k' --output=/x/tuned/",
        "seconds": 7500.0,
        "settings": {"output": "/x/tuned", "data": "/home/a person/flickr8k", "seed": 0},
        "data": "6,000 images\n  1 missing: /home/a person/flickr8k/a.jpg",
        "base_model": "checkpoints/compact",
        "history": history(),
        "stopped": "The validation recall sum had not risen for 3 evaluations.",
        "best_step": 300,
        "second_data": "coco, 5,000 pictures",
        "second_before": BEFORE,
        "second_after": SECOND,
        "second_difference": gap(BEFORE, SECOND),
        "interpolation": [
            {"alpha": 0.0, "recall_sum": 3.485, "second_recall_sum": 3.485},
            {"alpha": 0.5, "recall_sum": 3.6, "second_recall_sum": 3.5},
            {"alpha": 1.0, "recall_sum": 3.55, "second_recall_sum": None},
        ],
        "alpha": 0.5,
        "model_type": "clip",
        "data_name": "/home/a person/flickr8k",
    }
    return least(**(known | changed))


# ---------------------------------------------------------------- the record


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for record in (least(), full()):
        record.to_json(tmp_path / "run.json")
        assert RunRecord.from_json(tmp_path / "run.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_file_that_is_no_record_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    full().to_json(path)
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"colour": "red"}), "utf-8")
    with pytest.raises(ValueError, match="colour"):
        RunRecord.from_json(path)
    path.write_text("{", "utf-8")
    with pytest.raises(ValueError, match="not the record"):
        RunRecord.from_json(path)


def test_numbers_that_json_does_not_know_become_none(tmp_path: Path) -> None:
    record = least(history=[{"step": 1, "loss": math.nan, "grad_norm": math.inf, "logit_scale": 2.0}])
    assert record.history == [{"step": 1, "loss": None, "grad_norm": None, "logit_scale": 2.0}]
    record.to_json(tmp_path / "run.json")
    assert RunRecord.from_json(tmp_path / "run.json") == record


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("found /home/me/data/a.jpg, missing", "found a.jpg, missing"),
        ("(see ~/data/x) and ../../shared/y", "(see x) and y"),
        (r"C:\Users\me\cats and D:/pets/dogs", "cats and dogs"),
        ("data:/srv/secret/x '/srv/secret/y'", "data:x 'y'"),
        ("file:///srv/secret/x.tar", "x.tar"),
        ("/srv/pets with spaces/a.jpg", "pets with spaces/a.jpg"),
        ("https://me:word@x.example/a/b.tar?key=1", "https://x.example/a/b.tar"),
        ("train/pets and pets/pets with spaces", None),
        ("openai/clip and data/flickr8k at 3 images/s, 1/2, and / or", None),
        ("R@1/5/10 of 2026-01-02T03:04:05", None),
    ],
)
def test_texts_lose_local_folders_and_keep_everything_else(text: str, public: str | None) -> None:
    record = least(data=text, settings={"data": "/srv/pets with spaces"})
    assert record.data == (text if public is None else public)


def test_a_command_keeps_its_options_and_only_the_names_of_folders() -> None:
    assert full().command == "train --model checkpoints/compact --data flickr8k --output=tuned"
    assert full().name == "tuned"
    assert (
        least(settings={"data": "/pets", "output": "o"}, data="in train/pets, not /pets/a").data
        == "in train/pets, not pets/a"
    )
    assert least(command="train --data '/srv/unclosed").command == "train --data 'unclosed"


# ---------------------------------------------------------------- reading


def test_better_and_worse_need_a_difference_whose_interval_leaves_zero_out() -> None:
    difference = {"recall_sum": {"value": 0.1, "low": -0.01, "high": 0.2}}
    (change,) = changes(BEFORE, AFTER, difference)
    assert (change.verdict, change.difference) == ("a little better", "+10.0 [-1.0, +20.0]")
    difference["recall_sum"]["low"] = 0.01
    assert changes(BEFORE, AFTER, difference)[0].verdict == "better"


def test_each_metric_has_a_verdict_and_its_figures() -> None:
    found = {change.metric: change for change in changes(BEFORE, AFTER, gap(BEFORE, AFTER))}
    verdicts = {name: change.verdict for name, change in found.items() if "recall@" in name}
    assert verdicts == {
        "image_to_text_recall@1": "better",
        "image_to_text_recall@5": "better",
        "image_to_text_recall@10": "a little better",
        "text_to_image_recall@1": "worse",
        "text_to_image_recall@5": "the same",
        "text_to_image_recall@10": "a little worse",
    }
    first = found["image_to_text_recall@1"]
    assert (first.before, first.after) == ("38.8 [36.8, 40.8]", "43.1 [41.1, 45.1]")
    assert first.difference == "+4.3 [+3.1, +5.5]"


def test_a_higher_median_rank_is_worse() -> None:
    low, high = ({"text_to_image_median_rank": interval(value, 0)} for value in (3, 4))
    assert changes(low, high, gap(low, high))[0].verdict == "worse"
    assert changes(high, low, gap(high, low))[0].verdict == "better"


def test_the_reading_names_what_got_worse_beside_what_got_better() -> None:
    text = reading(changes(BEFORE, AFTER, gap(BEFORE, AFTER)))
    assert "**Better:** picture to captions R@1 (+4.3 [+3.1, +5.5])" in text
    assert "**Worse:** caption to pictures R@1 (-3.7 [-4.9, -2.5]), caption to pictures median rank (+1" in text
    assert re.search(r"little worse, but .* chance: caption to pictures R@10 \(-0\.3 \[", text)
    assert "clearly worse" not in text
    assert "No figure got clearly worse." in reading(changes(AFTER, AFTER, gap(AFTER, AFTER)))


# ---------------------------------------------------------------- the report


def test_the_report_of_a_full_run_says_what_was_done_and_what_it_brought(tmp_path: Path) -> None:
    text = write_report(full(), tmp_path).read_text("utf-8")
    assert "`checkpoints/compact` was fine-tuned on 6,000 pictures with 30,000 captions from `flickr8k`." in text
    assert "The best step was 300 of 600 planned; its weights were mixed with those at the start (alpha 0.5)." in text
    assert "took 2 h 05 min (67 min were estimated)" in text
    assert "Why it ended: The validation recall sum had not risen for 3 evaluations." in text
    assert "| caption to pictures R@1 | 29.7 [27.7, 31.7] | 26.0 [24.0, 28.0] | -3.7 [-4.9, -2.5] | worse |" in text
    assert "**Worse:** caption to pictures R@1 (-3.7 [-4.9, -2.5])" in text
    own, second = text.split("### On a second data set")
    assert "picture to captions R@1 (-8.8 [-10.0, -7.6])" in second
    assert "picture to captions R@1 (-8.8 [-10.0, -7.6])" not in own
    assert "| 0.5 | 360.0 | 350.0 | chosen |" in text
    assert "| 1 | 355.0 | – |  |" in text
    assert "--data flickr8k --output=tuned" in text
    assert "1 missing: flickr8k/a.jpg" in text
    assert "2.10 GB" in text
    assert '"seed": 0' in text
    assert "a person" not in text


def test_the_report_of_the_least_run_leaves_out_what_there_is_not(tmp_path: Path) -> None:
    text = write_report(least(), tmp_path).read_text("utf-8")
    assert "The best step was 0 of 600 planned; its weights were kept." in text
    for absent in ("second data set", "WiSE-FT", "![", "None", "nan"):
        assert absent not in text
    assert list((tmp_path / "plots").iterdir()) == []


def test_the_plots_are_pictures_of_a_sensible_size_and_the_report_shows_each(tmp_path: Path) -> None:
    text = write_report(full(), tmp_path).read_text("utf-8")
    paths = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in paths] == ["interpolation.png", "loss.png", "recall.png", "scale.png"]
    for path in paths:
        assert f"](plots/{path.name})" in text
        with Image.open(path) as image:
            assert 800 <= image.width <= 2000
            assert 400 <= image.height <= 1000
            assert len(image.convert("RGB").getcolors(2**20) or []) > 50  # something was drawn
            assert np.asarray(image.convert("L")).mean() > 200  # on white


def test_the_curve_is_drawn_where_the_figures_are(tmp_path: Path) -> None:
    """A loss that falls is blue at the upper left and the lower right, and nowhere else."""
    entries = [{"step": step, "loss": 10.0 - step} for step in range(10)]
    write_report(least(history=entries, best_step=-1), tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "plots" / "loss.png").convert("RGB")).astype(int)
    blue = (np.abs(pixels - (0, 0x72, 0xB2)).sum(axis=2)) < 30
    rows, columns = np.nonzero(blue)
    assert np.corrcoef(rows, columns)[0, 1] > 0.99  # rows count downwards


def test_a_second_report_takes_the_place_of_the_first(tmp_path: Path) -> None:
    write_report(full(), tmp_path)
    text = write_report(full(interpolation=[], alpha=None), tmp_path).read_text("utf-8")
    assert not (tmp_path / "plots" / "interpolation.png").exists()
    assert "interpolation.png" not in text


def test_broken_and_repeated_entries_of_the_history_do_not_stop_the_report(tmp_path: Path) -> None:
    entries = [
        *history()[:5],
        {"step": 30, "loss": math.nan},
        {"train_runtime": 3.0},
        *history()[3:],
    ]
    write_report(least(history=entries, best_step=10), tmp_path)
    assert (tmp_path / "plots" / "loss.png").is_file()


# ---------------------------------------------------------------- other people's text


def test_other_peoples_text_is_never_markup() -> None:
    assert code("a`b``c") == "```a`b``c```"
    assert code("`a`") == "`` `a` ``"
    assert code("a|b\nc\u202e") == r"`a\|b c`"
    assert plain("<b> [x](http://y) www.z *!*") == r"\<b\> \[x\]\(http\://y\) www\.z \*\!\*"
    assert block("a\n```\nb\x1b") == "````\na\n```\nb\n````"


def test_hostile_names_stay_text_in_the_report_and_the_card(tmp_path: Path) -> None:
    settings = {HOSTILE: HOSTILE, "output": "a\n---\nb"}
    record = full(
        base_model=HOSTILE, data_name=HOSTILE, stopped=HOSTILE, second_data=HOSTILE, started=HOSTILE, command=HOSTILE,
        data=f"```\n{HOSTILE}\n```", versions={HOSTILE: HOSTILE}, settings=settings,
        dataset_id=HOSTILE, base_model_id=HOSTILE, plan=PLAN | {HOSTILE: HOSTILE, "train_images": HOSTILE},
    )  # fmt: skip
    card = ModelCard(model_card(record), ignore_metadata_errors=False)
    for shown in (card.data.base_model, card.data.datasets[0], card.data.model_name):
        assert "\n" not in shown
    for text in (write_report(record, tmp_path).read_text("utf-8"), card.text):
        outside = _without_code(text)
        assert "<script" not in outside.replace(r"\<", "")
        assert not re.search(r"(?<!\\)\]\((?!plots/)", outside)
        assert "\u202e" not in text
        assert not re.search(r"^(# heading|---)", outside, re.MULTILINE)


def _without_code(markdown: str) -> str:
    """Drop code blocks and code spans as CommonMark finds them."""
    markdown = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", markdown)


# ---------------------------------------------------------------- the model card


def test_the_cards_front_matter_holds_the_measured_figures() -> None:
    card = ModelCard(
        model_card(full(base_model_id="openai/x", dataset_id="someone/pets")), ignore_metadata_errors=False
    )
    assert card.data.base_model == "openai/x"
    assert card.data.datasets == ["someone/pets"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "zero-shot-image-classification")
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results["caption to pictures R@1"].metric_value == 26.0
    assert results["caption to pictures R@1"].metric_type == "recall"
    assert results["caption to pictures median rank"].metric_value == 4
    assert results["recall sum (of 600)"].metric_type == "recall_sum"
    assert {result.dataset_type for result in results.values()} == {"someone/pets"}


def test_the_card_claims_nothing_that_is_not_known() -> None:
    card = ModelCard(model_card(least(model_type="composed_dual_encoder")), ignore_metadata_errors=False)
    for unknown in ("base_model", "datasets"):
        assert getattr(card.data, unknown) is None
    assert card.data.pipeline_tag == "feature-extraction"
    assert card.data.library_name == "image-text-alignment"


def test_the_card_shows_before_and_after_and_how_to_use_it() -> None:
    text = model_card(full())
    assert 'DualEncoder.load("USER/NAME")' in text
    assert "**Worse:** caption to pictures R@1" in text
    assert "| picture to captions R@1 | 38.8 [36.8, 40.8] | 43.1 [41.1, 45.1] |" in text
    for private in ("/home", "/x/", "a person"):
        assert private not in text


def test_report_and_card_can_be_made_again_from_the_file(tmp_path: Path) -> None:
    record = replace(full(), second_data="/srv/other/coco")
    assert record.second_data == "coco"
    record.to_json(tmp_path / "run.json")
    assert model_card(RunRecord.from_json(tmp_path / "run.json")) == model_card(record)
