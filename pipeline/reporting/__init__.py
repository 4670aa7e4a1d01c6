"""Figures and progress for people: metrics files, the display, versions; nothing here decides anything.

May import `parallel`. Start reading at `metrics`.
"""
