"""The market's rules: who is asked, what a bid costs, who wins, which states a task passes through. Pure."""
