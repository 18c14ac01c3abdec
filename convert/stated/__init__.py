"""What files and options say where no code is run, and what the loss on a text decides of the rest."""
