"""The interchangeable encoders, from full length to PRO-SCALE's, and the settings that all of them share."""
