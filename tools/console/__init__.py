"""The `longspan` command: one name for every program of tools/, from any folder.

Installed as the package `longspan`, from where it finds the other packages of this project, under names that a user's
own folders may bear too. Imports nothing of the project until it has done so. Start reading at `command`.
"""
