"""Runs methods and control arms on questions, measures them, and compares the results.

arms, bench, last_turn     which settings are run, and the records that one batch gives
rows, tasks, grading       questions, and how answers to them are graded (code: sandbox)
feeders                    what is fed in place of the paper's aligned state
ledger, settings, replay   a run's folder: results, what they depend on, a repeated run
stats, summary, verdict    from records to numbers, tables and one sentence
probe, audit               attention, transplants and geometry; the report of --audit
looking                    thoughts as tokens, and who is attended to, of --lens
figures, drawing           the pictures of tools/plot.py
"""
