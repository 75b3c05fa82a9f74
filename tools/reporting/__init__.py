"""Makes one HTML file from a run's records.

records      reads a run's folder, or the output of `minimas ask --json`, checked and in one shape
questions    finds the questions in the prompts of a run
page         from records to the file: page.html, with page.css and page.js in it
"""
