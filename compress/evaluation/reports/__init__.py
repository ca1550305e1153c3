"""What people and CI read: tables, pictures and documents made from records and verdicts alone. Free of torch.

JSON is the source: nothing here scores or decides anything, and the same input gives the same bytes.
"""
