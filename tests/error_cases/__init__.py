"""Every mistake a user can make, one case each: how it is made, and the message it must end with.

The cases run through the real command line, in a folder with a good model, good rows and a good
config of which one thing is broken. `docs/errors.md` is written from them.
"""

from tests.error_cases import config, data, environment, model, run, tokenizer

CASES = (
    *config.CASES,
    *model.CASES,
    *tokenizer.CASES,
    *data.CASES,
    *run.CASES,
    *environment.CASES,
)
