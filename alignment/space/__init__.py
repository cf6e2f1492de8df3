"""Floor 4, the app as a Hugging Face Space; `python -m alignment.space publish USER/NAME`.

Place in the flow: `model + gallery -> the Space's folder (folder) -> checks -> the Hub (publish)`.
"""

from alignment.space.command import main
from alignment.space.folder import ModelSource, Space, choose_model, stage
from alignment.space.publish import publish

__all__ = ["ModelSource", "Space", "choose_model", "main", "publish", "stage"]
