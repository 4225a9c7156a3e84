"""Many runs: a sweep file → variants → matched widths → a plan → runs → their status.

grammar   the words of a sweep file
design    a sweep file, checked, as variants of its base experiment
drafts    the blocks of a sweep file, expanded to what each row changes
fraction  regular parts of a factorial, and what they alias
matching  one width of each variant solved, so that its size or cost is the baseline's
probe     the same for the time of a training step, measured and kept
differences  what a variant changes, to be read
plan      rows, counts, what is done already, and what the rest will take
guard     whether every row does something, before anything runs
manifest  runs/sweeps/<name>.json: the rows and their runs, for all that comes after

local     runs them on this machine: machine.py says how many at a time, server.py forks, worker.py
          is one run in its process, live.py looks on
cluster   the cluster file: where runs are carried out, and how much of it each may have
snapshot  the source that was submitted, kept once per content in runs/code/
slurm     submits them as job arrays
queue     what has been submitted, on record in runs/slurm/
scheduler what Slurm says of it
task      what runs inside a job: a rank of one run, or local.py for one run or a pack

status    how far runs are, from their directories and Slurm
logs      what one of them printed
control   submitting, stopping and freeing the runs of a sweep, wherever they run
"""
