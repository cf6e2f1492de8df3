"""Write the Space's README.md: its configuration, which the Hub reads, and a description.

Place in the flow: `model, title, hardware -> README.md (here) -> the Space's folder`.
"""

from __future__ import annotations

from importlib.metadata import version

from huggingface_hub import SpaceCardData

from alignment.space.model_source import ModelSource

TITLE = "Image-Text Alignment"
THUMBNAIL = "assets/screenshots/search_en.png"
DESCRIPTION = "Search pictures by caption and captions by picture"  # the Hub refuses more than 60 characters

_BODY = """\
# {title}

Drop in a picture and read the captions that fit. Type a caption, in English or Chinese, and see the pictures that fit.
Look at the similarity matrix that decides both. What you drop in is kept for your visit alone.

Model: {model}.
"""


def card(repo_id: str, title: str, model: ModelSource, hardware: str | None) -> str:
    """Write README.md.

    Args:
        repo_id: "USER/NAME" of the Space.
        title: shown on its card and tab.
        model: what it runs; a model on the Hub is fetched while the Space is built, not when it starts.
        hardware: what is suggested for duplicates of the Space.

    Raises:
        ValueError: when the title is empty.
    """
    title = " ".join(title.split())  # a line break could end the front matter
    if not title:
        raise ValueError("A Space needs a title.")
    data = SpaceCardData(
        title=title,
        emoji="🔎",
        colorFrom="indigo",
        colorTo="gray",
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version="3.12",
        app_file="app.py",
        short_description=DESCRIPTION,
        thumbnail=f"https://huggingface.co/spaces/{repo_id}/resolve/main/{THUMBNAIL}",
        license="apache-2.0",
        tags=["image-text-retrieval", "cross-modal-retrieval", "contrastive-learning"],
        models=[model.name] if model.revision else None,
        preload_from_hub=[f"{model.name} {','.join(model.files)} {model.revision}"] if model.revision else None,
        suggested_hardware=hardware or "cpu-basic",
    )
    link = f"[{model.name}](https://huggingface.co/{model.name})" if model.revision else f"`{model.name}`"
    return f"---\n{data.to_yaml()}\n---\n\n{_BODY.format(title=title, model=link)}"
