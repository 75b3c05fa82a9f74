"""Make one HTML file from the records of a run.

records      read and check a run's folder, or the output of `minimas ask --json`
questions    find the questions in the prompts of a run
page         render records as HTML, with page.html, page.css and page.js
"""
