"""Implements `drlora_jax.evaluate`: tasks, protocols, scoring, statistics, code execution.

answers, sources              texts and rows, without a model
multiple_choice, generated,
loss, code_tasks              from items to samples, with a model
tasks, jobs                   the table of tasks, and the tasks of one command
harness*                      tasks of lm-evaluation-harness
statistics, results           from samples to scores, and the files of a run directory
compare                       two files of samples, pair by pair
sandbox*                      programs in an isolated process
"""
