"""The page's own colours and sizes: one accent, system fonts, three sizes of type (14, 18, 28 px). Everything else refers to these."""

import gradio as gr

ACCENT, ACCENT_DARK = "#0b5cad", "#8ab8f0"
_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace"]
_SMALL = "14px"

COLORS = {
    "body_background_fill": ("#ffffff", "#101318"),
    "background_fill_primary": ("#ffffff", "#101318"),
    "background_fill_secondary": ("#f5f6f8", "#181c23"),
    "body_text_color": ("#191c22", "#e8eaee"),
    "body_text_color_subdued": ("#596070", "#a3abba"),
    "border_color_primary": ("#dfe2e8", "#2c323d"),
    "border_color_accent": (ACCENT, ACCENT_DARK),
    "border_color_accent_subdued": (ACCENT, ACCENT_DARK),
    "color_accent_soft": ("#e8f0f9", "#1b2a3d"),
    "link_text_color": (ACCENT, ACCENT_DARK),
    "link_text_color_hover": (ACCENT, ACCENT_DARK),
    "link_text_color_active": (ACCENT, ACCENT_DARK),
    "link_text_color_visited": (ACCENT, ACCENT_DARK),
    "block_background_fill": ("transparent", "transparent"),
    "block_label_background_fill": ("transparent", "transparent"),
    "block_label_text_color": ("#596070", "#a3abba"),
    "block_title_text_color": ("#191c22", "#e8eaee"),
    "block_info_text_color": ("#596070", "#a3abba"),
    "input_background_fill": ("#ffffff", "#181c23"),
    "input_background_fill_focus": ("#ffffff", "#181c23"),
    "input_border_color": ("#8d94a3", "#5d6675"),
    "input_border_color_focus": (ACCENT, ACCENT_DARK),
    "input_placeholder_color": ("#6b7280", "#8d95a5"),
    "checkbox_background_color_selected": (ACCENT, ACCENT_DARK),
    "checkbox_border_color_selected": (ACCENT, ACCENT_DARK),
    "checkbox_label_background_fill_selected": ("#e8f0f9", "#1b2a3d"),
    "checkbox_label_text_color_selected": ("#191c22", "#e8eaee"),
    "checkbox_label_border_color_selected": (ACCENT, ACCENT_DARK),
    "slider_color": (ACCENT, ACCENT_DARK),
    "loader_color": (ACCENT, ACCENT_DARK),
    "button_primary_background_fill": (ACCENT, ACCENT_DARK),
    "button_primary_background_fill_hover": ("#094b8d", "#a9cbf5"),
    "button_primary_text_color": ("#ffffff", "#101318"),
    "button_primary_text_color_hover": ("#ffffff", "#101318"),
    "button_primary_border_color": (ACCENT, ACCENT_DARK),
    "button_secondary_background_fill": ("#ffffff", "#101318"),
    "button_secondary_background_fill_hover": ("#f5f6f8", "#181c23"),
    "button_secondary_text_color": ("#191c22", "#e8eaee"),
    "button_secondary_border_color": ("#8d94a3", "#5d6675"),
    "error_background_fill": ("#fdeceb", "#3a1a1a"),
    "error_text_color": ("#9b1c1c", "#ffb4ab"),
    "error_border_color": ("#9b1c1c", "#ffb4ab"),
    "table_border_color": ("#dfe2e8", "#2c323d"),
}
"""Of the theme, by its own names: (light, dark)."""
_PLAIN = {
    "body_text_size": _SMALL, "block_label_text_size": _SMALL, "block_title_text_size": _SMALL, "block_info_text_size": _SMALL,
    "input_text_size": _SMALL, "checkbox_label_text_size": _SMALL, "prose_text_size": _SMALL, "section_header_text_size": _SMALL,
    "button_large_text_size": _SMALL, "button_medium_text_size": _SMALL, "button_small_text_size": _SMALL, "chatbot_text_size": _SMALL,
    "block_border_width": "0px", "block_padding": "0px", "block_shadow": "none", "block_title_text_weight": "500",
    "block_label_border_width": "0px", "panel_border_width": "0px", "panel_background_fill": "transparent",
    "layout_gap": "24px", "form_gap_width": "16px", "button_border_width": "1px",
    "input_border_width": "1px", "input_shadow": "none", "input_shadow_focus": "none",
    "button_primary_shadow": "none", "button_secondary_shadow": "none", "checkbox_label_shadow": "none", "checkbox_shadow": "none",
    "button_large_text_weight": "500", "button_medium_text_weight": "500", "button_small_text_weight": "500",
}


def theme() -> gr.themes.Base:
    """The theme of all pages."""
    sizes = dict.fromkeys(("xxs", "xs", "sm", "md"), _SMALL)
    made = gr.themes.Base(
        text_size=gr.themes.Size(**sizes, lg="18px", xl="28px", xxl="28px", name="text_explorer"),
        radius_size=gr.themes.sizes.radius_md, spacing_size=gr.themes.sizes.spacing_md, font=_FONT, font_mono=_MONO,
    )
    colors = {name: light for name, (light, _) in COLORS.items()} | {f"{name}_dark": dark for name, (_, dark) in COLORS.items()}
    return made.set(**colors, **_PLAIN, color_accent=ACCENT)
