"""Training: the loop (`trainer`), one optimizer step, metrics and where they are reported, previews, the run's folder.

`trainer.Trainer` is the entry point of the command `train`; `run_folder.RunFolder` names the files of a run.
"""
