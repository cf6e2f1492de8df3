"""Many more hostile uploads than `tests/test_fuzz.py` has, from a seed that is another one each time.

The seed is printed; `FUZZ_SEED=123 make test-long ARGS="-k fuzz"` runs the same again.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from adversarial_images import saved, scene, sound
from adversarial_zips import archive, archive_names, archives, as_photos, as_trial, opened

import app
from alignment.engine import AlignmentEngine, dataset_eval
from alignment.engine.photo_zip import export_zip
from alignment.gallery import build_gallery
from alignment.model import DualEncoder

SEED = int(os.environ.get("FUZZ_SEED") or time.time())
PICTURES, IN_A_PROCESS, ZIPS = 400_000, 20_000, 6_000
MEMORY_MB = 700  # as FULL_SIZE_MB of the short test: any size may come of a flipped bit


@pytest.mark.timeout(3600)
def test_very_many_mutated_pictures():
    print(f"FUZZ_SEED={SEED}")
    found: Counter[str] = Counter()
    env = {**os.environ, "PYTHONPATH": str(Path(app.__file__).parent)}
    for batch in range(PICTURES // IN_A_PROCESS):
        script = str(Path(__file__).parents[1] / "adversarial_images.py")
        command = [sys.executable, "-W", "ignore", script, str(SEED + batch), str(IN_A_PROCESS)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, (SEED + batch, done.stderr[-3000:])
        answer = json.loads(done.stdout.splitlines()[-1])
        assert answer["peak"] - answer["base"] < MEMORY_MB, SEED + batch
        found.update(answer["found"].values())
    print(found)
    assert found.total() == PICTURES
    assert found["decoded"] > PICTURES / 10


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_very_many_mutated_zips(checkpoint, tmp_path, monkeypatch, no_thread_stays):
    print(f"FUZZ_SEED={SEED}")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "one.png").write_bytes(saved(scene(), "PNG"))
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    engine = AlignmentEngine(encoder, build_gallery(tmp_path / "source", tmp_path / "gallery", encoder))
    files = [(f"{row}.png", sound()[kind].data) for row, kind in enumerate(("PNG", "JPEG", "GIF"))]
    album = export_zip(engine.add_photos(engine.no_photos(), files)[0], encoder)
    scratch, path = tmp_path / "scratch", tmp_path / "upload.zip"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr(dataset_eval, "RESAMPLES", 3)
    found = Counter()
    for name in archive_names(SEED, ZIPS, (*archives(), "album")):
        path.write_bytes(archive(name, {"album": album}))
        for way in (lambda: opened(path), lambda: as_photos(engine, path), lambda: as_trial(engine, path)):
            try:
                found[way()] += 1
            except Exception as error:
                raise AssertionError(name) from error
    print(found)
    assert list(scratch.iterdir()) == []
