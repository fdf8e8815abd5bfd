"""Turns a plan into files that provision, scale and watch a cluster, and reads them back to check that nothing was lost."""
