"""What `drlora_jax.evaluate` is made of: tasks, protocols, scoring, statistics, code execution.

questions, prompts, answers   rows and texts; no model
multiple_choice, generated,
loss, code_tasks              items to samples, with a model
tasks                         the table
statistics, results           samples to scores, and the files of a run directory
sandbox, sandbox_child        programs in a process of their own
"""
