"""Top floor, addresses that lead to what somebody saw: `?tab=pictures&q=a+red+bicycle&lang=en`.

`q` is what is asked on the tab: a query, captions (one a line), or the id of one of the gallery's pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from alignment.ui.results import Value
from alignment.ui.strings import text
from alignment.ui.widgets import Tab


def link_value(tabs: Sequence[Tab], lang: str) -> Value:
    """Lay the button out that copies such an address, for `link.js`."""
    words = {"copy": text(lang, "link.copy"), "copied": text(lang, "link.copied"), "byHand": text(lang, "link.by_hand")}
    return {"tabs": [tab.key for tab in tabs], "lang": lang, "words": words}


def arrivals(tabs: Sequence[Tab]) -> list[Any]:
    """List what an address may change on the tabs."""
    return [part for tab in tabs for part in tab.arrival]


def load_from_url(tabs: Sequence[Tab], lang: str, query: Mapping[str, str]) -> list[Any]:
    """Show what an address asks for.

    Args:
        tabs: of the page.
        lang: that the page will speak.
        query: of the address.

    Returns:
        What to change of the row of tabs, then of `arrivals(tabs)`; nothing for an address that asks for nothing.
    """
    key, asked = query.get("tab", ""), query.get("q", "").strip()
    changes: list[Any] = [gr.Tabs(selected=key) if key in {tab.key for tab in tabs} else gr.skip()]
    for tab in tabs:
        wanted = tab.key == key and asked
        changes += tab.load_from_url(lang, asked) if wanted else [gr.skip()] * len(tab.arrival)
    return changes
