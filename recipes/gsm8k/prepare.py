"""From a row of GSM8K (`question`, `answer`) to what the trainer reads."""

# math_verify knows some units, such as hours. With others ("72 eggs") the right number counts as wrong
SYSTEM_PROMPT = "Solve the problem step by step, one step per line. End with the final answer in \\boxed{}, a number without a unit."


def row_to_prompt(row: dict) -> dict:
    """
    Adds `prompt` (a conversation), `solution` (the final answer, which the outcome reward compares with) and `reference`
    (the worked solution without GSM8K's calculator marks, which the judge may read).
    """
    worked, _, final = row["answer"].partition("####")
    pieces = worked.split("<<")
    reference = pieces[0] + "".join(piece.partition(">>")[2] for piece in pieces[1:])
    return {
        "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": row["question"]}],
        "solution": f"\\boxed{{{final.strip().replace(',', '')}}}",
        "reference": f"{reference.strip()}\n#### {final.strip()}",
    }
