"""Runs on a SLURM cluster: submitted as arrays, started by their elements, looked after without accounting.

=================  ============================================================================================
`cluster`          SLURM's own commands
`submission`       what has been handed in, written down in ``.slurm`` beside the runs, so that none goes in twice
`work`             what the launcher does with the runs it is given
`element`, `job`   what one element of an array does on its node; `node`, on each of several
`waiting`          what has become of them
=================  ============================================================================================
"""
