"""A study trains models that differ in one setting, compares their samples, and reports tables and pictures.

`config` lists the models and samplers, `tasks` trains, draws and measures, `report` turns the results into study.json
and tables, `plot` into a picture. The command is `patch_based_ddpm.study`.
"""
