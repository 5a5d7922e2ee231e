"""
Base and checkpoints side by side on maths benchmarks: `python -m trl_sgpo.scripts.evaluate`. `sets` reads the problems,
`engines` and `server` let a model answer them, `scoring` compares the answers, `samples` keeps them, `results` makes
numbers of them, `evaluation` puts these together, `tables` and `card` show them.
"""
