"""The Space's README.md: its configuration, which the Hub reads, and a few lines for people.

Place in the flow: `model, gallery, hardware -> README.md (here) -> the Space's folder`.
"""

from __future__ import annotations

from importlib.metadata import version

from huggingface_hub import SpaceCard, SpaceCardData

from alignment.space.model_source import ModelSource

TITLE = "Image-Text Alignment"
THUMBNAIL = "assets/screenshots/search_en.png"
DESCRIPTION = "Search pictures by caption and captions by picture"
LONGEST_DESCRIPTION = 60  # characters; the Hub refuses more

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
        model: what it runs; one of the Hub is fetched while the Space is built, not when it starts.
        hardware: what is suggested to whoever duplicates it.
    """
    title = " ".join(title.split())  # a line of its own could end the front matter
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
    text = f"---\n{data.to_yaml()}\n---\n\n{_BODY.format(title=title, model=link)}"
    check_card(text)
    return text


def check_card(text: str) -> None:
    """Refuse what the Hub would refuse of a README.md; raises ValueError."""
    data = SpaceCard(text).data.to_dict()
    if len(data["short_description"]) > LONGEST_DESCRIPTION:
        raise ValueError(f"short_description has more than {LONGEST_DESCRIPTION} characters.")
    if not str(data["title"]).strip():
        raise ValueError("A Space needs a title.")
