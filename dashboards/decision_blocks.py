"""What a plan decides or warns of beside the fleet, on a page: the report's own paragraphs and tables, in the page's language."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from dashboards.elements import draw_table
from dashboards.words import translated
from planner.report_blocks import Block, Grid, Heading, Paragraph


def draw_blocks(blocks: Sequence[Block], name: str) -> None:
    """Headings, paragraphs and tables; ``name`` begins the names of the tables' files."""
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
        elif isinstance(block, Grid):
            number += 1
            rows = [[translated(cell) for cell in row] for row in block.rows]
            frame = pd.DataFrame(rows, columns=[translated(cell) for cell in block.header])
            draw_table(frame, title, f"{name}.csv" if number == 1 else f"{name}-{number}.csv", is_wide=True)
