"""Top floor, colours, type and spacing of Gradio's own controls; ours are in `assets/ui/page.css`."""

from __future__ import annotations

import gradio as gr

# No font is fetched: Latin letters in the system's own face, Chinese in whatever each system has for it.
FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Noto Sans",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "sans-serif",
)
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Make the theme."""
    base = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="zinc",
        radius_size="md",
        spacing_size="md",
        text_size="md",
        font=FONTS,
        font_mono=MONO,
    )
    return base.set(
        body_background_fill="#fbfbfc",
        body_background_fill_dark="#111114",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_padding="0",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1b1b20",
        input_border_width="1px",
        input_border_color="#d4d4dc",
        input_border_color_dark="#3a3a44",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",  # white on 500 falls just short of 4.5 : 1
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_border_color="#d4d4dc",
        button_secondary_border_color_dark="#3a3a44",
        button_border_width="1px",
    )
