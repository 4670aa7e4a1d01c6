"""Figures and progress for people: metrics files, the display, versions; nothing here decides anything.

May import `parallel.errors`. Start reading at `metrics`.
"""
