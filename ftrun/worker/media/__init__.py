"""Images, videos and sounds in rows.

While rows are tokenised, `place` finds each medium and looks at its header, and a conversation's text has one
placeholder token for it, where the chat template writes it. Only when a batch is made, `batch` opens the media
(`images`, `videos`, `sounds`), and the model's own processor (`processor`) says which tokens a placeholder becomes.
What a family of models does in another way than the rest stands in the file of its model type (`family`).
"""
