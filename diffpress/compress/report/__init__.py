"""The report of a run: report.html, report.json and report.csv, and the comparison of several runs. Imports no torch.

facts.py -> verdict.py, figures.py -> page.py (templates/, plots.py, pictures.py)          write.py, compare.py
"""
