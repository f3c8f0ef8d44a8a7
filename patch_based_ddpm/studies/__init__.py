"""A study trains models that differ in one setting, compares their samples, and reports tables and pictures.

`config` says what is compared, `tasks` trains, draws and measures, `report` makes study.json and the tables of the
results, `plot` the picture. The command is `patch_based_ddpm.study`.
"""
