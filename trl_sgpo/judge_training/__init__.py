"""
Training of step-wise judges: the arguments, the data, one file per kind of judge, and the card of the result.
`python -m trl_sgpo.scripts.judge_train` runs it. Only `discriminative` and `generative` import torch.
"""
