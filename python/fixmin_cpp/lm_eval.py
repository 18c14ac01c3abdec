"""The command line of lm-evaluation-harness with the model "fixmin" registered: `python -m fixmin_cpp.lm_eval run ...`.

Only for a harness that knows no plugins, up to 0.4.13; a later one finds the model through its entry point.
"""

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    import fixmin_cpp.lm_eval_model  # noqa: F401 - registers the model

    cli_evaluate()
