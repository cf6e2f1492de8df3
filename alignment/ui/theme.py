"""UI, theme: colours, type and spacing of Gradio's controls; those of our own are in `assets/ui/page.css`."""

import gradio as gr

# Fonts of the reader's system, for Latin and Chinese; none is fetched.
FONTS = (
    "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, Noto Sans, PingFang SC, Hiragino Sans GB, "
    "Microsoft YaHei, Noto Sans CJK SC, Source Han Sans SC, sans-serif"
)
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"

_COLOURS = {  # token -> in light mode, in dark mode
    "body_background_fill": ("#fbfbfc", "#111114"),
    "block_background_fill": ("transparent", "transparent"),
    "block_label_background_fill": ("transparent", "transparent"),
    "input_background_fill": ("#ffffff", "#1b1b20"),
    "input_border_color": ("#d4d4dc", "#3a3a44"),
    "input_border_color_focus": ("*primary_500", "*primary_400"),
    "button_primary_background_fill": ("*primary_600", "*primary_600"),  # white on 500 has a contrast below 4.5 : 1
    "button_primary_background_fill_hover": ("*primary_700", "*primary_700"),
    "button_secondary_background_fill": ("transparent", "transparent"),
    "button_secondary_border_color": ("#d4d4dc", "#3a3a44"),
}


def theme() -> gr.themes.Base:
    """Make the theme."""
    base = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="zinc",
        radius_size="md",
        spacing_size="md",
        text_size="md",
        font=FONTS.split(", "),
        font_mono=MONO.split(", "),
    )
    colours = {f"{name}{mode}": pair[bool(mode)] for name, pair in _COLOURS.items() for mode in ("", "_dark")}
    widths = {
        "block_border_width": "0px",
        "block_padding": "0",
        "input_border_width": "1px",
        "button_border_width": "1px",
    }
    return base.set(**colours, **widths, button_primary_text_color="#ffffff")
