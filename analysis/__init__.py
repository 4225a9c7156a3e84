"""What the runs say: tables, intervals and figures, from the run directories alone.

`results` reads a sweep's manifest and its runs, `statistics` turns seeds into intervals,
`table` writes one row per variant, and `render` and `figures` print it. Nothing here needs
torch, a server or the machine that trained.
"""
