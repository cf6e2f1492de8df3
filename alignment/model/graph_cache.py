"""The cache of OpenVINO graphs, by the content of the checkpoint's files.

Place in the flow: `checkpoint folder -> digest -> graphs and model info (here) -> encoder`. An entry in `graphs` below
`$ALIGNMENT_CACHE`, else below `~/.cache/alignment`, holds what serving needs without the PyTorch module: `ModelInfo` in
`facts.json`, and of each side a graph (`image.xml`, `image.bin`) and, written last, how to run it and the hashes of its
files (`image.json`). A file that is missing, cut off or altered is made again; where nothing may be written, a graph
lives as long as the process.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from alignment.atomic import atomic_write, remove_stale_temp
from alignment.checksum import read_json_checksummed, sha256_of, write_json_checksummed
from alignment.model.checkpoints import SMALL_FILES, TRAINING_FILES
from alignment.model.openvino import OpenVINOTower, openvino, version_token
from alignment.model.tower import Kind

logger = logging.getLogger(__name__)

FORMAT = 2  # of an entry; also what a change of the export raises
MAX_ENTRIES = 16


@dataclass(frozen=True)
class ModelInfo:
    """What serving needs to know of a model besides its graphs; see the properties of `DualEncoder`."""

    fingerprint: str
    logit_scale: float
    logit_bias: float | None
    embed_dim: int


def checkpoint_digest(folder: Path) -> str:
    """Name a checkpoint by the content of its files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in (*SMALL_FILES, "*.safetensors") for path in folder.glob(pattern)}):
        if path.name not in TRAINING_FILES:
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class GraphCache:
    """The graphs of one model, on disk where that is possible."""

    entry: Path | None  # None disables the cache, as for a model that came from no folder

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Find the entry of a checkpoint, new or old."""
        try:
            home = Path(os.environ.get("ALIGNMENT_CACHE") or "~/.cache/alignment").expanduser()
        except RuntimeError:  # a user without a home, as in some containers
            return cls(None)
        return cls(Path(os.path.abspath(home), "graphs", f"{checkpoint_digest(folder)[:32]}-{FORMAT}"))

    def info(self) -> ModelInfo | None:
        """Read what is known of the model; None where nothing intact is."""
        try:
            return ModelInfo(**read_json_checksummed(self.entry / "facts.json")) if self.entry else None
        except (OSError, ValueError, TypeError):
            return None

    def write_info(self, info: ModelInfo) -> None:
        """Write what is known of the model."""
        self._write("facts.json", asdict(info))

    def tower(self, kind: Kind) -> OpenVINOTower | None:
        """Compile a graph that was kept for this processor and this OpenVINO; None where there is none intact."""
        if self.entry is None or not (self.entry / f"{kind}.json").is_file() or openvino() is None:
            return None
        try:
            about = read_json_checksummed(self.entry / f"{kind}.json")
            files = {name: sha256_of(self.entry / name) for name in about["files"]}
            if files != about["files"] or about["made_by"] != version_token():
                return None
            return OpenVINOTower(self.entry / f"{kind}.xml", about["precision"])
        except Exception as error:  # OpenVINO raises anything on a damaged file
            logger.warning("The cached %s graph in %s cannot be used and is made again: %s", kind, self.entry, error)
            return None

    def make(self, kind: Kind, export: Callable[[Path], str]) -> OpenVINOTower:
        """Make a graph, and keep it; `export` writes "NAME.xml" and "NAME.bin", and returns the precision to run in."""
        with ExitStack() as stack:
            aside = tempfile.mkdtemp(prefix="alignment-graph-")
            stack.callback(shutil.rmtree, aside, ignore_errors=True)
            path = Path(aside, f"{kind}.xml")
            precision = export(path)
            if self._keep(kind, path, precision) and (kept := self.tower(kind)) is not None:
                return kept
            tower = OpenVINOTower(path, precision)
            weakref.finalize(tower, stack.pop_all().close)  # the files live as long as the graph
            return tower

    def _keep(self, kind: Kind, path: Path, precision: str) -> bool:
        """Put a graph's files in place, the one with their hashes last."""
        if self.entry is None:
            return False
        parts = (path, path.with_suffix(".bin"))
        hashes = {part.name: sha256_of(part) for part in parts}
        try:
            self.entry.mkdir(parents=True, exist_ok=True)
            remove_stale_temp(self.entry)
            for part in parts:
                with atomic_write(self.entry / part.name) as fresh:  # another process may be reading the old file
                    shutil.copyfile(part, fresh)
        except OSError as error:
            logger.warning("The %s graph is not kept for the next start, which takes longer: %s", kind, error)
            return False
        self._write(f"{kind}.json", {"precision": precision, "made_by": version_token(), "files": hashes})
        _evict_oldest(self.entry.parent)
        return True

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if self.entry is None:
            return
        try:
            write_json_checksummed(self.entry / name, content)
        except OSError as error:
            logger.warning("%s is not kept for the next start, which takes longer: %s", name, error)


def _evict_oldest(home: Path) -> None:
    ages = []
    for path in home.iterdir():
        with suppress(OSError):  # another process may have removed it
            ages.append((path.stat().st_mtime, path))
    for _, entry in sorted(ages)[:-MAX_ENTRIES]:
        shutil.rmtree(entry, ignore_errors=True)
