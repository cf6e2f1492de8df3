"""Floor 4, the app as a Hugging Face Space; `python -m alignment.space publish USER/NAME`.

Place in the flow: `model (model_source) + gallery -> the Space's folder (folder, card) -> checks -> the Hub (publish)`.
"""

from alignment.space.command import main
from alignment.space.folder import Space, stage
from alignment.space.model_source import ModelSource, choose_model
from alignment.space.publish import publish

__all__ = ["ModelSource", "Space", "choose_model", "main", "publish", "stage"]
