"""Floor 4, the app as a Hugging Face Space.

Place in the flow: `model + gallery -> the Space's folder -> the Hub`.

    python -m alignment.space publish USER/NAME --dry-run
    python -m alignment.space publish USER/NAME

| module    | what it does |
|-----------|--------------|
| `choice`  | the model: one that is sent along, or one of the Hub at a commit |
| `gallery` | the public copy of a gallery: thumbnails and captions, nothing of where the pictures lie |
| `card`    | the Space's README.md with its configuration |
| `folder`  | all files of the Space |
| `checks`  | refuses secrets, paths of this machine and what the Hub would refuse |
| `sending` | creates or updates the Space |
| `command` | the command |
"""

from alignment.space.command import main
from alignment.space.folder import Space, stage
from alignment.space.model_source import ModelSource, choose_model
from alignment.space.publish import PublishResult, publish

__all__ = ["ModelSource", "PublishResult", "Space", "choose_model", "main", "publish", "stage"]
