"""A text to compare two models on when none is given: English, code and Chinese, because an error may show in one of them only.
All three are within the first 256 tokens.

Real text and not random tokens: a router sends the tokens of a text to few experts and those of noise to all, and a trained model's logits on noise are flat.
"""

SAMPLE = '''\
The notice on the quay was short. Sailings on Sundays are suspended until further notice; tickets that were already bought remain valid for thirty days,
and anyone who needs a doctor should ring the bell beside the green door, day or night, and wait.

```sql
SELECT port, COUNT(*) AS arrivals, AVG(delay_minutes) AS mean_delay
FROM crossings WHERE sailed_on >= '2019-04-01' AND cancelled = FALSE
GROUP BY port HAVING COUNT(*) > 30 ORDER BY mean_delay DESC;
```

渡轮在早晨六点多离开港口，海面上还飘着薄雾。老船长说，这条航线他走了三十年，每一块礁石的位置都记在心里。岛上的居民不到两百人，大多以捕鱼和种土豆为生；到了冬天，
年轻人会去城里打工，只留下老人和孩子。今年春天，学校重新开了门，来了一位教数学的女老师，她第一节课就问：如果船速是每小时二十公里，逆流每小时四公里，那么往返四十八公里
一共需要多长时间？孩子们算了很久，最后答案是五个小时。

The ferry left the harbour a little after six, when the fog had thinned enough to show the second buoy but not yet the third. Marta stood at the
rail with her collar up and counted the islands as they came: the low one with the ruined kiln, the one where goats were left for the summer, and at last the
long grey back of Hovden, which she had not seen for eleven years. "You will find it smaller," her brother had written, "and the people older, but the
bread is the same." She doubted the bread.

To estimate how long the crossing takes against the tide, divide the distance of 14.5 nautical miles by the difference of the two speeds: at 11 knots
through the water and 2.4 knots of current, 14.5 / (11 - 2.4) is about 1.69 hours, or one hour and 41 minutes. On the way back the current helps, and
14.5 / 13.4 gives 65 minutes. The mean of both ways is therefore longer than in still water (79 minutes each), which surprises most passengers.

```python
def running_median(values, width):
    """Median of the last `width` values, after each new one."""
    window, result = [], []
    for index, value in enumerate(values):
        bisect.insort(window, value)
        if index >= width:
            window.remove(values[index - width])
        middle = len(window) // 2
        result.append(window[middle] if len(window) % 2 else 0.5 * (window[middle - 1] + window[middle]))
    return result
```
'''
