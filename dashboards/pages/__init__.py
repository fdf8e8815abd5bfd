"""One module a page; each has ``draw(here)``, called by :mod:`dashboards.frame` inside the frame."""
