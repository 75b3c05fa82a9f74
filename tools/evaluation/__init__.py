"""Run methods and control arms on questions, measure them, and compare the results.

arms, bench, last_turn     the settings of a run, and the records of one batch
layouts                    layouts of the conversation that only measurements use
rows, tasks, grading       questions, and how their answers are graded (programs: sandbox)
feeders                    maps that replace the paper's alignment W_a
ledger, settings, replay   the folder of a run: results, settings, and a repeated run
stats, summary, verdict    statistics, tables, and the verdict of an audit
probe, audit               attention, transplants and geometry; the report of --audit
looking, attention         thoughts as tokens, and the attention on them, for --lens
figures, drawing           the pictures of tools/plot.py
"""
