"""What a plan decides or warns of beside the fleet, on a page: the report's own paragraphs and tables, in the page's language."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from dashboards.elements import draw_csv, draw_table
from dashboards.plain_text import escaped
from dashboards.words import translated
from planner.report_blocks import Block, Bullets, Grid, Heading, Paragraph


def draw_blocks(blocks: Sequence[Block], name: str, *, is_long: bool = False) -> None:
    """Headings, paragraphs and tables; ``name`` begins the names of the tables' files; ``is_long``: cells are sentences, in full."""
    title, number = name, 0
    for block in blocks:
        if isinstance(block, Heading):
            title = translated(block.text)
            st.subheader(title, anchor=False)
        elif isinstance(block, Paragraph):
            if block.tone == "muted":
                st.caption(translated(block.text).replace("$", "\\$"))
            else:
                st.text(translated(block.text))
        elif isinstance(block, Bullets):
            st.text("\n".join(f"• {translated(item)}" for item in block.items))
        elif isinstance(block, Grid):
            number += 1
            rows = [[translated(cell) for cell in row] for row in block.rows]
            frame = pd.DataFrame(rows, columns=[translated(cell) for cell in block.header])
            file_name = f"{name}.csv" if number == 1 else f"{name}-{number}.csv"
            if is_long:
                st.table(frame.map(escaped), hide_index=True, alt=title)
                draw_csv(frame, file_name)
            else:
                draw_table(frame, title, file_name, is_wide=True)
